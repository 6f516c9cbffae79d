-- The work of time. ARGV: gateway or '' (its heartbeat), queue or '', orphan seconds, result ttl, most per kind,
-- pause seconds, grace seconds.
-- Costs O(log n + what is due), whatever the number of models. Returns {done, waiting in `queue`}.
local gateway, queue = ARGV[1], ARGV[2]
local orphan_seconds, ttl, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local now = server_time()
local done = 0
if gateway ~= '' then call('ZADD', P .. 'gateways', now, gateway) end

-- Where nobody swept for a while, Redis itself was away, or everybody was: then nobody could renew either,
-- and all get some time to come back before anyone is taken for dead.
local swept = call('HMGET', P .. 'swept', 'at', 'grace')
local grace = tonumber(swept[2] or 0)
if not swept[1] or now - tonumber(swept[1]) > tonumber(ARGV[6]) then grace = now + tonumber(ARGV[7]) end
call('HSET', P .. 'swept', 'at', now, 'grace', grace)
local is_grace = now < grace

local due = is_grace and {} or call('ZRANGE', P .. 'leases', '-inf', now, 'BYSCORE', 'LIMIT', 0, most)
for _, id in ipairs(due) do
  local f = read(id)
  if f and f.state == 'running' then
    lose(id, f, 'its lease expired', ttl)
  else
    call('ZREM', P .. 'leases', id)
  end
  done = done + 1
end

for _, id in ipairs(take_overdue(now, most)) do
  local f = read(id)
  if f and f.state == 'waiting' then
    end_from_outside(id, f, 'expired', 'expired', 'DeadlineExceeded',
      'The request waited past its deadline and was not started.', ttl)
  end
  done = done + 1
end

local silent = is_grace and {}
  or call('ZRANGE', P .. 'gateways', '-inf', now - orphan_seconds, 'BYSCORE', 'LIMIT', 0, 8)
for _, dead in ipairs(silent) do
  for _, id in ipairs(call('SRANDMEMBER', P .. 'open:' .. dead, most)) do
    local f = read(id)
    if f and (f.state == 'waiting' or f.state == 'running') then
      end_from_outside(id, f, 'cancelled', 'cancelled', 'GatewayLost',
        'The gateway that took the request is gone and nobody came back for the answer.', ttl)
    else
      call('SREM', P .. 'open:' .. dead, id)
    end
    done = done + 1
  end
end

local over, gone = is_grace and {} or call('ZRANGE', P .. 'kept', '-inf', now, 'BYSCORE', 'LIMIT', 0, most), 0
for _, id in ipairs(over) do
  if gone >= most then break end
  gone = gone + math.max(1,
    end_kept(id, 'NobodyCame', 'The client left and nobody came back for the answer in time.', ttl))
end
done = done + gone
flush(now)
for _, dead in ipairs(silent) do
  if call('EXISTS', P .. 'open:' .. dead) == 0 then call('ZREM', P .. 'gateways', dead) end
end
return { done, queue ~= '' and length(queue) or 0 }
