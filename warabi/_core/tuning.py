"""Constants of time: how long the library and the mount poll, wait, retry and back off.

Each says its unit, what it trades, and why it has this value.  Sizes and counts are with the code
that they bound, and what belongs to a format or a protocol is with that.
"""

from __future__ import annotations

# Timeouts of clients

SILENCE_TIMEOUT = 60.0
"""Seconds without a sign of life after which a call fails, unless the engine's configuration says
otherwise.  Less reports a dead provider earlier; more survives one that swaps or is stopped."""
CONNECT_TIMEOUT = 10.0
"""Seconds for connecting and for the handshake.  Several retransmissions of SYN (1, 2 and 4 s) fit
into it, and a host that is down is reported while its user still waits."""
READ_DEADLINE, CHANGE_DEADLINE = 5, 60
"""Default deadlines of operations that only read, and of those that may wait for stable storage or
a migration, in multiples of the time without a sign of life: nothing but a fault makes a read take
minutes, but a flush to a busy disk, or a migration, may."""
SLOW_FACTOR = 10
"""Factor on the timeout of an asynchronous request that may wait for stable storage while others
complete: less would fail during a long flush, more would hide a request that is lost."""
DEADLINE_CHECK = 1.0
"""Seconds after which a blocked receive checks its deadline: deadlines may be late by this, and an
idle thread wakes up no more often."""
INTERRUPT_CHECK = 0.1
"""Seconds after which code that defers interrupts checks for one: Ctrl-C seems immediate, and ten
wake-ups a second cost nothing."""
ERASE_PATIENCE = 10.0
"""Seconds to erase a region that could not be filled, before it is left behind: the caller waits
for its error meanwhile."""
GRANT_PATIENCE = 0.5
"""Seconds to wait for a pending grant when a client closes: it is a reply on a local socket."""
LEAVE_PATIENCE = 2.0
"""Seconds for a Trio program's guest to leave when it closes; the provider notices its end
anyway."""
CLOSE_PATIENCE = 5.0
"""Seconds to wait for other threads' accesses when direct access closes: longer than a copy takes,
but a thread that is stopped does not block closing for ever."""
RECONNECT_PATIENCE = 30.0
"""Default seconds for which calls wait for a reconnect: a provider that is restarted opens its
target within that."""
RECONNECT_DELAYS = (0.05, 2.0)
"""Seconds between attempts to connect, at first and at most: a restart is noticed at once, and a
provider that stays away is not flooded."""
MIGRATION_PROGRESS = 0.1
"""Seconds between two queries of a migration's progress, for a display that moves."""

# Timeouts of providers

OPENING_PATIENCE = 10.0
"""Seconds in which a peer must complete its handshake: it holds a connection, but has no rights
yet.  The same as what a client allows for connecting."""
STALL_PATIENCE = 60.0
"""Seconds that a peer may take for each ``STALL_SIZE`` bytes that use shared buffers: 70 kB/s,
below which others would wait for the buffers."""
DRAIN_PATIENCE = 2.0
"""Seconds for peers to send the rest of a request and read replies when the engine stops: a service
manager waits for the process to exit."""
ACCEPT_PAUSE = 0.1
"""Seconds without accepting connections when descriptors or memory run out: less would only log the
same again."""
FREEZE_CHECK = 0.2
"""Seconds between checks whether a migration that waits for pending changes was cancelled."""
CHANGES_PATIENCE = 120.0
"""Seconds for pending changes to end before a migration: more than a peer may stall in one."""
MIGRATION_PATIENCE = 300.0
"""Seconds without a message from the source after which a migration is aborted: it may be reading
large regions from a busy disk, and nothing but a half-made target waits here."""

# Turns of event loops

IDLE_TURN = 250_000
"""Nanoseconds of serving requests after which other tasks get a turn: some twenty-five small
requests, which share the cost of one turn; more would delay the other tasks."""
QUIET_TURN = 1_000_000
"""The same if only connecting and disconnecting tasks wait, which may wait longer."""
CLIENT_TURN = 250_000
"""Nanoseconds of consecutive requests of a client after which other tasks get a turn; as above."""
PAYLOAD_TURN = 2_000_000
"""Nanoseconds of polling for chunks of a payload after which other tasks get a turn: more than for
requests, since leaving a stream costs throughput."""
INLINE_MOMENT = 5
"""Most milliseconds in one poll(2): more than a tick of the kernel's clock, since a shorter timeout
arms a timer each time, which costs more than the rest of the call."""
INLINE_TURN = 5
"""Milliseconds of consecutive requests after which other tasks get a turn, if waiting is inline."""
INLINE_LONGEST = 10
"""Milliseconds after which it stops waiting for the next chunk of a reply, even if chunks keep
arriving; this bounds how long other tasks of the loop wait."""
DUMP_PATIENCE = 2.0
"""Seconds in which an event loop has to list its tasks for a dump of the process's state: more than
any step of a task takes that is no fault."""
REPORT_PATIENCE = 1.0
"""Seconds in which a target has to answer a report of a mount: reading statistics never hangs."""
HTTP_PATIENCE = 10.0
"""Seconds for a request to the server of metrics and the status page: many times what a scrape of a
busy process takes, and a peer that sends slowly does not keep a thread for long."""
SAMPLE_INTERVAL = 2.0
"""Seconds between samples for the plots of the status page, and between its updates: it seems live,
and costs little."""
HTTP_TURN = 0.5
"""Seconds after which that server looks whether to end connections, or itself."""
LOOP_HOLD = 0.25
"""Default seconds after which a held loop is reported: every request of the loop waits for that
long."""
WATCHDOG_IDLE = 5.0
"""Seconds of an idle loop after which its watchdog sleeps; starting it again costs one system
call."""
GC_HOLD = 0.02
"""Seconds of a full garbage collection after which what survives is frozen: a longer pause would
delay every request, and frozen objects are not collected."""

# Busy polling, see eventloop/busy_poll.py

POLL_MOMENT = 100_000
"""Most nanoseconds of polling for a message: twice what waking a process on another core takes, so
at most that is lost if none comes."""
POLL_LONGEST = 1_000_000
"""Most additional nanoseconds: one per byte that was moved since the last message, which is the
time between two messages of a stream of 1 GB/s."""
POLL_SOON = 150_000
"""A message that arrived within so many nanoseconds of blocking would have been found by
polling."""
POLL_LATE = 500_000
"""If a yielded core stays away for so many nanoseconds, it went to more than a short reply."""
POLL_PAUSE = (5_000_000, 160_000_000)
"""Nanoseconds without polling after that: at first, and at most if it happens again.  A machine
whose cores are all busy is left alone, and is tried again some times a second."""

# Targets

COMMIT_INTERVAL = 5.0
"""Seconds after which volatile changes of the catalogue are committed without a request: what a
power failure may take, as with ext4, against one flush for the changes of so many seconds."""
STEP_PAUSE = 0.0005
"""Seconds between two steps of a long operation, without which the next step could take the lock
first every time."""
OCCUPIED_GRACE = 0.02
"""Approximate longest time in seconds between finding a target free and acquiring its lock; what
holds the lock for long waits so much longer."""
OCCUPIED_POLL = (0.001, 0.02)
"""Seconds between two polls whether a target is free again, at first and at most: short holds are
hardly prolonged, and long ones cost no processor time."""
GUESTS_PATIENCE = 1.0
"""Seconds to wait for accesses by other processes when a target closes or is migrated: a guest that
is stopped must not keep it open."""
GUESTS_POLL = 0.001
"""Seconds between two looks whether they have ended: an access takes some microseconds."""
HANDOVER_POLL = 0.0005
"""Seconds between two looks at what another thread is about to finish and does not announce."""
CLOSING_PATIENCE = 60.0
"""Seconds to wait for a target's owner that is closing, if the caller waits at all: it may have
much to flush."""
DEAD_PATIENCE = 5.0
"""Seconds to wait if a target's owner is dead, but a child that it was just starting still has its
descriptors: until that calls execve(2)."""
OWNER_BEAT, OWNER_SILENCE, OWNER_POLL = 1.0, 7.0, 0.1
"""Seconds between two signs of life of a target's owner in a pool; without one before another
process takes the target over; and between two looks at them.  A takeover within 10 s, by which a
process that the scheduler keeps from running for some seconds is still not fenced off."""
POOL_PATIENCE = 30.0
"""Seconds for which a call waits for a pool of a cluster: an OSD that died is reported within 20 s,
and another takes over."""
POOL_CONNECT = 10.0
"""Seconds for connecting to a cluster, as ``CONNECT_TIMEOUT``."""
LOCK_POLL = 0.02
"""Seconds between two attempts to lock a target's file, which has no queue."""
SLOW_WRITE = 5_000_000
"""Nanoseconds; a write that only copies a page or two takes less, except on a very busy machine."""
SLOW_WRITE_BYTE = 5
"""Nanoseconds for each byte that is copied, at most: 200 MB/s, which every memory exceeds."""
SLOW_WRITE_PAUSE = (50_000_000, 3_200_000_000)
"""Nanoseconds for which an event loop tries no write after a slow one, at first and at most: it
would block again for as long as the kernel throttles writers."""
GROUPS_CHECK = 60.0
"""Seconds between two looks at which control groups the process is in, since processes hardly ever
move; their limits are read each time."""
MEMORY_CHECK = 1.0
"""Seconds between two looks at the machine's available memory, which read files of /proc."""
WATCH_POLL = 0.05
"""Least seconds between polls of guests' writes, which send no notifications: how long another
client may see old bytes."""
WATCH_CHECK = 1.0
"""Seconds between checks that a watched target is still the same, while there are no guests."""

# Logging

LOG_INTERVAL = 5.0
"""Seconds after which one more message of a format is logged, when many came: it stays visible that
it goes on, and the log stays readable."""

# Mounts

MOUNT_PATIENCE = 2.0
"""Seconds for an earlier mount to release the target: it has left the mount table already."""
MOUNT_ANSWER = 30.0
"""Seconds for a new mount, or fusermount3, to respond before mounting fails: also on a machine that
swaps."""
DOCTOR_ANSWER = 5.0
"""Seconds for an existing mount to respond before the doctor calls it dead."""
HELLO_PATIENCE = 30_000
"""Milliseconds for the kernel's first request, which it sends when mount(2) returns."""
FUSE_MOMENT = 5
"""Milliseconds for which the loop may block when no request is pending.

A value below a tick of the kernel's clock would arm a timer each time, which costs more than the
rest of a request.
"""
KILL_CHECK = 0.2
"""Seconds between two checks whether an interrupted thread is being killed: kill(1) seems
immediate, and one check reads a file of /proc."""
LOCK_CANCEL_PAUSE = 0.1
"""Seconds between two attempts to cancel a request for a lock: the first may come before the lock
was requested, and an interrupted program should not wait noticeably longer."""
RECENT_READ = 1.0
"""Seconds between a read and a write that the kernel may have been about to send by then."""
SHUTDOWN_CONNECT = 2.0
"""Seconds for a connection to a mount's shutdown socket to be queued: its process may hang."""
IN_KERNEL = 0.5
"""Seconds after which a thread that sends a notification must be in the kernel; later, it is taken
to be stuck, and requests are answered without it."""
PURGE_PATIENCE = 0.1
"""Seconds for which a write past the page cache waits until the kernel has dropped pages: it may
need a reply of this mount first."""
FOLLOW_PAUSE = 1.0
"""Seconds before the next attempt to follow changes after the provider did not reply."""
FOLLOW_PATIENCE = 2.0
"""Seconds to wait for the thread that invalidates to leave the kernel, before unmounting goes
on."""
UNMOUNT_PATIENCE = 60.0
"""Default seconds to wait for the mount process to exit: it persists everything first."""
LAZY_PATIENCE = 1.0
"""The same for a lazy unmount, after which programs may keep files open for long."""
KILLED_PATIENCE = 5.0
"""Seconds for the threads of a killed process to exit before its mount is aborted: what they still
do may be a flush."""
KILLED_POLL = 0.05
"""Seconds between two looks whether they have."""
