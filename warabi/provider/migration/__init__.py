"""Targets that move from one provider to another, whatever the two backends are.

The source connects to the destination, has its changes wait (``provider/freeze.py``), and sends the
catalogue row by row, then the bytes, region by region, in messages of ``transfer_size`` bytes.
The destination builds the target aside (``staging.py``); nobody can open it there.

The commit point is one ``rename`` at the destination, of the finished catalogue to the path of
the target (in memory: its adoption by the provider).  Everything is on the medium before it.

* Before it, whatever fails, either process's death included, leaves the source whole, and it goes
  on serving; the destination has nothing, or leftovers that the next target or migration at that
  path removes.
* After it, the destination serves, says so, and the source stops: its operations raise
  ``TargetNotFound`` that says where the target went; its files are removed if that was asked for,
  the catalogue first.
* Between the two, when the source dies, or when the destination's word does not arrive and it
  cannot be asked again, both have the target, whole.  A source that lives goes on serving and
  ``migrate_target`` raises ``ConnectionLost`` that says so.  There is no point at which neither
  has it.
"""
