"""Layout of the memory that a provider and its guests share; see ``target/leases.py``."""

HAZARD_SLOTS = 64
"""Hazard slots of one guest: its most concurrent accesses."""
ENTRIES = 1 << 19
"""Most granted regions of a target; memory for them is allocated when used."""

METADATA_DURABLE = 2 * ENTRIES
"""Where in the table, in words of 8 bytes, the versions of metadata-durable regions begin."""
TABLE = 8 * (METADATA_DURABLE + ENTRIES)
"""Size of the table in bytes."""
