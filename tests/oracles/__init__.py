"""Independent truth for the tests: slow formulas, the trainers' own classes, and whole files in the trainers' naming.

Nothing here imports ``lib_locon``. Start at :func:`tests.oracles.cases.all_cases`.
"""
