"""What the command's verbs do, as functions: one file a verb, which the command and Python share.

Each has a record of what may be chosen, with the command's defaults. These modules import what they
run inside their functions, so that the command's help, which is made of the records, needs no
torch.
"""
