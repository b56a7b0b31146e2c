"""The census: every model of a zoo, fused, verified and explained.

``worker`` makes a row of one model, ``ledger`` keeps the rows in a file, ``sweep`` runs the workers, ``rivals`` runs
other tools beside, and ``page`` writes what the rows say.
"""
