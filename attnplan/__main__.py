"""``python -m attnplan``."""

from attnplan.cli import main

if __name__ == "__main__":
    main()
