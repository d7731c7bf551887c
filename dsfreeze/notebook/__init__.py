"""What the notebooks need beyond plotting: records found and read, rows for their tables, and the sentences they end on. No torch.

Each notebook has a module here. Rows are lists of plain dicts, as pandas takes them; a `finding` is a sentence computed from rows, so
that it changes when they do.
"""
