"""`python -m checkpoint_tools`."""

from checkpoint_tools.cli import app
from ep_engine.command_line import exit_with_sentence

if __name__ == "__main__":
    exit_with_sentence(app)
