"""`python -m checkpoint_tools`."""

from checkpoint_tools.cli import app, exit_with_sentence

if __name__ == "__main__":
    exit_with_sentence(app)
