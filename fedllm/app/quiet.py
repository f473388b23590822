"""The libraries' own words, kept out of ours."""

from __future__ import annotations

import contextlib
import os


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(ImportError):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
