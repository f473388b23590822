"""Run the command line as `python -m fedllm`."""

from fedllm.app.cli import main

main()
