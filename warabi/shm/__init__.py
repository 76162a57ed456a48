"""Shared memory through which processes of one host access regions without messages.

The protocol, hazard pointers with versions and membarrier(2), is described in
``warabi/target/leases.py``, which has the provider's side.  Here are the client's: ``client.py``
requests grants, and ``_fast_path.c`` accesses what was granted.
"""
