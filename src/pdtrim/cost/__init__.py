"""What a pair is worth: stage times, the handover, queues, machines and money. No torch here.

Every number says where it comes from: a measured file by its name, AIConfigurator, the user, or a
formula. Where none of these has it, it is refused and never guessed.
"""
