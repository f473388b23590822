"""An OpenAI-compatible endpoint for what a run made: what may be asked, how it is answered, and the server."""
