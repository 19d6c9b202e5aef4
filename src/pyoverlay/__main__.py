"""`python -m pyoverlay`."""

from pyoverlay.cli import main

if __name__ == "__main__":
    main()
