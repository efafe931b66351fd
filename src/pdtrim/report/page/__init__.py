"""One page of HTML from runs: what pdtrim's verbs left, read, put into sections and shown."""
