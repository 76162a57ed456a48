"""Migration of a target from one provider to another, whatever the two backends are.

The source connects to the destination, blocks its changes (``provider/freeze.py``), and sends the
catalogue row by row, then the data, region by region, in messages of ``transfer_size`` bytes.
The destination builds the target separately (``staging.py``), where it cannot be opened.

The commit point is one ``rename`` at the destination, of the finished catalogue to the path of
the target (in memory: its adoption by the provider).  Everything is on stable storage before it.

* Before it, any failure, including the death of either process, leaves the source intact, and it
  continues to serve; the destination has nothing, or leftovers that the next target or migration at
  that path removes.
* After it, the destination serves and reports this, and the source stops: its operations raise
  ``TargetNotFound`` with the new location; its files are removed if requested, the catalogue first.
* In between, if the source dies, or the destination's reply is lost and it cannot be asked again,
  both have the complete target.  A source that lives continues to serve and ``migrate_target``
  raises ``ConnectionLost`` with this information.  At no point does neither have it.
"""
