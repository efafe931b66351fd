"""``python -m pdtrim``."""

from pdtrim.cli import main

main()
