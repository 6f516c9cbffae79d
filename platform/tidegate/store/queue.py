"""The queue of requests in Redis: what it promises and why its steps may interleave as they like.

Who runs where
    Gateways submit, cancel and receive (`GatewayQueue`); replicas claim, emit, renew and give back
    (`ReplicaQueue`); both sweep (`Sweeper`); autoscalers and people ask for depths (`QueueDepths`). Every
    step that touches more than one key is one Lua script (`scripts`). Redis runs one script at a time, so
    scripts never interleave; what interleaves is processes between their scripts. A script checks before its
    first write, because Redis does not undo what a failing script wrote.

Where things are ({prefix}: in front of each)
    req:{id}            hash     the request: state, queue, tenant, gateway, bytes, attempt, seq, body, ...
    log:{id}            string   its framed segments, end to end: the truth about what was generated
    waiting:{queue}     zset     id by score = submit order minus priority bands
    suspects:{queue}    zset     the same for waiting requests that may have killed a replica
    leases              zset     running id by expiry      deadlines  zset  waiting id by deadline
        (waiting, suspects and deadlines are the waiting line: `lua/waiting.lua` alone touches them)
    held:{replica}      hash     running id to "attempt seq suspect gateway written", what changes with every
                                 token
    queue:{queue}, share:{queue}:{key}, tenant:{tenant}, total
                        hash     requests and bytes, waiting and running together, and the bytes that those
                                 which run have written; drain
    prefixes:{queue}    hash     how prompts begin, and which replicas leased such ones last: bounded, a hint
    outcomes:{queue}    hash     how its requests ended (`messages.outcomes`)
    burst:..., failed:..., counted:..., lost:{replica}  string  an error, session, loss counted just now
    shadows             set      unfinished ids of shadows   pair:{id}  string  the end of one of the two
    open:{gateway}      set      unfinished ids            gateways   zset  gateway by last heartbeat
    call:{id}           hash     a call that is kept: tenant, times, bytes, what it needs to be read again
    kept                zset     their ids by when they go   kept_bytes  hash  their bytes, by tenant
    replica:{replica}   hash     its last claim, its suspect, whether it has room  swept  hash  the last sweep
    gw:{gateway}, rep:{replica}, wake:{queue}, changed:{what}   channels

States
    waiting -> running -> done | failed | cancelled | expired, and running -> waiting where an attempt ends
    without a result. Only scripts move a request; a terminal state is never left, and reaching it takes the
    request off every set and counter in the same step. A final segment, also one that Lua writes, ends the
    log; the hash and the log stay for the result's time to live.

Attempts
    `attempt` counts claims. A write names the attempt it belongs to, and only the current attempt of a
    running request may write; the id of any other is returned as stale. So a worker that was stopped, lost
    its lease and wakes up cannot write (Q8), and a cancelled request has no current attempt at all.
    `seq` numbers segments across attempts. A segment whose number was written is accepted and not written
    again, so an emit whose reply was lost may be repeated; one that skips a number proves that Redis lost
    writes in a restart, and sends the request to another attempt that continues from the log.

Repeats
    Where a connection breaks, nobody knows whether the script in flight ran. All may be repeated: submit
    finds its ids, claim carries a number and gets the same answer again, the others change nothing twice.

Waking
    A submit publishes on wake:{queue} only if nothing waited before it. That suffices: a replica with a
    free slot claims until a claim returns less than it asked for, that is, until it saw the set empty; every
    request after that moment either makes the set non-empty (and a message goes out) or joins one that did
    so after that moment (and the message is already on its way). A replica without a free slot claims when
    one becomes free, whatever it was told. Subscribing comes before the first claim. Giving back and
    expiry of a lease always publish. Messages get lost only with a connection, and each reconnect counts as
    a message; a sweep, once a second, looks again.

Prefixes
    A submit writes how its prompt begins (`messages.prefixes`), a claim who leased it: prefixes:{queue}
    names the last four replicas that did, for each beginning. Of the first 16 that wait, within a priority,
    a claim takes first those that its replica holds and last those that another one holds; what four hold
    is nobody's. Whoever is passed over starts a round, in which only these 16 are taken: at most 15 come
    before one that came sooner. What another replica holds that has room, and is not much busier, is left
    to it for one claim: the same message woke both, and the one that left it looks again at once and then
    takes whatever it finds. Nothing waits for a replica or a timer. All of this is a hint: an engine may
    have forgotten, a replica may be dead, and nothing is lost but the preference. A replica or a gateway of
    the version before neither writes nor reads it.

Delivery
    A channel message is the fast path, the log is the truth. A gateway that misses a message sees a gap in
    `seq` or a reconnect, and replays the log. Messages to one gateway keep the order in which scripts ran.

Death and poison
    A lease that expires, or a `fault`, counts as a death of the request if that attempt emitted nothing new.
    After one death the request is a suspect. A replica holds at most one suspect, and if it dies holding
    one, only that one is blamed; so the innocents of a batch that a poison request took down are cleared
    one by one, by their first new segment, and the second death ends the poison as `failed`, PoisonRequest.
    A request that lost three replicas after emitting (a poison further down its stream) is a suspect too,
    and only its end clears it. The note of a replica's suspect outlives the suspect's own judgement, because
    the other leases of the dead replica may be judged later.

Outcomes
    Each end is counted by the script that makes it, in the queue that the request is in, under the cohort of
    its submit. What an end in an engine was worth its replica says; what ends outside of one is an error of
    ours (past the deadline, poison) or counts nowhere. What fails together is one event: of a tenant's errors
    one counts in a second, over all revisions of a model, of a session's one in an hour, and a replica is
    lost once. Each process carries its own scripts, so one of the version before counts nothing and breaks
    nothing.

Moves
    A request that waits may go to the queue of another revision; its place is its score, which is of all
    queues, so it keeps it. One that is submitted to the old queue later goes with the next move, and so does
    one that ran and comes back. It was admitted to the other revision: here it has no cohort.

Shadows
    A copy of a request for a revision that is tried out has no gateway. It has the lowest priority, no part
    of it is charged to a tenant, it takes at most half of any bound and leaves the line where a client would
    be refused. Nothing of it stays after its end, but that both ends are counted as a pair: the request's own
    hash says that it is shadowed from its submit on, so it does not matter which of the two ends first, or
    that the copy comes later.

Kept calls
    A call that may be read again is written down (`keep`) before its submit. Its requests belong to no
    gateway but to the call: `call:{id}` is their gateway, so every reader, on whatever gateway, hears the
    call's own channel, and no gateway's death ends them. While somebody reads it (`attend`) or it lingers, it
    lives; then a sweep cancels what runs and removes all. After the end of its requests it stays for its
    seconds, and their logs with it. What is kept has bounds of its own: bodies count at once, logs when they
    end, and until then in the queue; a call that would pass one is refused.

Memory
    What is submitted and what is generated count against the same bounds: of a model, of one key's share of
    it, of a tenant, and in all. A submit that would pass one is refused; a running request whose log would,
    ends where it holds more than its equal part, so that the largest answers end and the others go on. Where
    Redis itself has no memory left, submits are refused and everything else goes on, because it frees some;
    the largest logs end there too. What a gateway has read to its end is forgotten at once (`forget`).

Time
    Leases, deadlines and heartbeats are kept in the server's time; a submit carries its sender's clock, so
    that a deadline means the same span on both. A deadline is for waiting: a request that has emitted is
    continued whatever the hour. After a pause without sweeps nobody is taken for dead for some seconds,
    because while Redis was away nobody could renew.
"""

from tidegate.store.depths import QueueDepths
from tidegate.store.gateway_queue import GatewayQueue
from tidegate.store.replica_queue import ReplicaQueue
from tidegate.store.sweeper import Sweeper

__all__ = ["GatewayQueue", "QueueDepths", "ReplicaQueue", "Sweeper"]
