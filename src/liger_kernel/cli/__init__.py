"""The command line: `liger_kernel COMMAND` or `python -m liger_kernel COMMAND`.

A command is a function of plain arguments that returns an `Answer` (`answer.py`) and prints nothing. `app.py` lists
them with their arguments, from which `parse.py` makes the parser: typer's, or argparse's where typer is not installed.
`present.py` prints an answer: by rich, as plain text, or as JSON.
"""
