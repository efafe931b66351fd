"""Every method on the same text and tasks, brought to the same share of parameters removed.

``systems.py`` says what is compared, ``store.py`` keeps what was made on disk, ``measure.py`` makes
plans and measures them, ``summary.py`` puts the numbers of one system beside another's, and
``records.py`` is the result file. ``run.py`` is what ``pdtrim compare`` does.
"""
