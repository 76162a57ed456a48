"""The form of the memory that a provider and its guests share; ``target/leases.py`` tells its
use."""

LANES = 64
"""Accesses that one guest can have under way at once."""
ENTRIES = 1 << 19
"""Regions of a target that may be granted at once; the memory for them is taken when used."""

FIRM = 2 * ENTRIES
"""Where in the table, in words of 8 bytes, the stamps of firm regions begin."""
TABLE = 8 * (FIRM + ENTRIES)
"""Bytes of the table."""
