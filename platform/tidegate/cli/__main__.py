"""`python -m tidegate.cli`: the command where its script is not on the PATH."""

from tidegate.cli.main import main

main()
