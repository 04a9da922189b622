"""`python -m sirius`: the command."""

from sirius.cli import main

if __name__ == "__main__":
    main()
