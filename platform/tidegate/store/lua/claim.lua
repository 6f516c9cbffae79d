-- ARGV: queue, replica, number of this claim, most, lease seconds, result ttl, seconds to keep the replica's record,
--   takes_all ('1': also what another replica may be about to claim, because it holds how the prompt begins)
-- Returns {whether something was left to another replica, {attempt, body, log} per leased request}.
-- It stops behind so many bytes: over a reply of 32 MB Redis ends a connection that hears channels.
local MOST_BYTES = 4194304
local WINDOW = 16 -- so many are chosen from
local ALONE_EVERY = 32 -- of a replica's claims: what it leases then is held by it alone, as far as is known
local queue, replica, number, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local lease_seconds, ttl, keep = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local takes_all = ARGV[8] == '1'
local now = server_time()
local record = P .. 'replica:' .. replica
local h = call('HMGET', record, 'number', 'claimed', 'suspect', 'hungry')

local function log_of(id, attempt)
  return attempt > 1 and call('GET', P .. 'log:' .. id) or ''
end

if h[1] == number then -- the reply to this very claim was lost: give it again
  local again = {}
  for id in string.gmatch(h[2] or '', '%S+') do
    local r = call('HMGET', P .. 'req:' .. id, 'state', 'replica', 'attempt', 'body')
    if r[1] == 'running' and r[2] == replica then
      again[#again + 1] = { tonumber(r[3]), r[4], log_of(id, tonumber(r[3])) }
    end
  end
  return { 0, again }
end

local suspect = h[3]
if suspect then
  local lease = unpack_lease(call('HGET', P .. 'held:' .. replica, suspect))
  if not lease or not lease.suspect then
    call('HDEL', record, 'suspect')
    suspect = nil
  end
end

local leased, ids, chains, bytes = {}, {}, {}, 0
local held, expiries = {}, {} -- written together below

-- Lease one request that was just taken off the line; past its deadline it expires instead.
local function lease(id, is_suspect)
  local f = read_record(id, true)
  if not f or f.state ~= 'waiting' then return false end
  if f.seq == 0 and f.deadline <= now then
    end_from_outside(id, f, 'expired', 'expired', 'DeadlineExceeded',
      'The request waited past its deadline and was not started.', ttl)
    return false
  end
  local attempt = tonumber(f.attempt) + 1
  call('HSET', P .. 'req:' .. id, 'state', 'running', 'attempt', attempt, 'mark', f.seq, 'replica', replica)
  held[#held + 1] = id
  held[#held + 1] = pack_lease(attempt, f.seq, is_suspect, f.gateway, f.written)
  expiries[#expiries + 1] = now + lease_seconds
  expiries[#expiries + 1] = id
  ids[#ids + 1] = id
  if f.chain then chains[#chains + 1] = f.chain end
  local log = log_of(id, attempt)
  leased[#leased + 1] = { attempt, f.body, log }
  bytes = bytes + #f.body + #log
  return true
end

-- Back to its place; the message wakes this replica too, which then claims again.
local function untake(id)
  local f = read_record(id)
  if f and f.state == 'waiting' then rejoin(queue, id, f.score, false, f.seq == 0 and f.deadline) end
end

while not suspect and #leased < most do
  local id = take_suspect(queue, most)
  if not id then break end
  if lease(id, true) then
    suspect = id
    call('HSET', record, 'suspect', id)
  end
end

-- Whether one of these has room, and is not so much busier that the request and those who run there are better off with
-- this replica: where all are idle, nobody gets a second prompt for what it holds before all have one.
local loads = {} -- of other replicas: the number of requests that it runs; false: it has no room
local function may_go_to(holders)
  loads[replica] = loads[replica] or call('HLEN', P .. 'held:' .. replica)
  for other in string.gmatch(holders, '%S+') do
    if loads[other] == nil then
      loads[other] = call('HGET', P .. 'replica:' .. other, 'hungry') == '1' and call('HLEN', P .. 'held:' .. other)
    end
    if loads[other] and loads[other] <= 1.5 * (loads[replica] + #leased) + 1 then return true end
  end
  return false
end

-- Take up to `most` of the window: first those whose beginning this replica holds, last those that others hold. What is
-- left to another replica is not taken now, nor is anything of a lower priority.
local OWN, NOBODYS, OTHERS = 1, 2, 3
local known, left = knows_any(queue) and {}, 0
local function choose(most)
  local among_these, round = among(queue, WINDOW)
  local classes, chosen, last = { {}, {}, {} }, {}, 0
  local holders = holders_of(queue, replica, among_these, known)
  left = 0
  for place, id in ipairs(among_these) do
    local holder = holders[id]
    local class = (not holder or holder.is_common) and NOBODYS or holder.is_own and OWN or OTHERS
    if class == OTHERS and not takes_all and may_go_to(holder.holders) then left = left + 1 else add(classes, class, place) end
  end
  for class = OWN, OTHERS do
    for _, place in ipairs(classes[class]) do
      if #chosen < most then chosen[#chosen + 1] = among_these[place]; last = math.max(last, place) end
    end
  end
  if round and last > #chosen then pass_over(queue, round) end
  take(queue, chosen)
  return chosen
end

while #leased < most and bytes < MOST_BYTES do
  local first = known and choose(most - #leased) or take_first(queue, most - #leased)
  if #first == 0 then break end
  for i, id in ipairs(first) do
    if bytes < MOST_BYTES then lease(id, false) else untake(id) end
  end
end

call_with('HSET', P .. 'held:' .. replica, held)
call_with('ZADD', P .. 'leases', expiries)
hold(queue, replica, chains, known or {}, tonumber(number) % ALONE_EVERY == 0)
local hungry = #leased < most and '1' or '0'
if #leased > 0 then
  call('HSET', record, 'number', number, 'claimed', table.concat(ids, ' '), 'hungry', hungry)
  call('EXPIRE', record, keep)
elseif h[4] ~= hungry then
  call('HSET', record, 'hungry', hungry)
  call('EXPIRE', record, keep)
end
flush(now)
return { left, leased }
