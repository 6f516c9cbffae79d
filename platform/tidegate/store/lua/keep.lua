-- Keep a call, before its submit. ARGV: id, tenant, sequences, seconds after its end, seconds unattended, most bytes of
--   the tenant and in all, record
-- Returns '', or whose bound is reached: tenant, total.
local id, tenant, sequences, seconds, linger, most_of_tenant, most, record = unpack(ARGV)
local name = P .. 'call:' .. id
if call('EXISTS', name) == 1 then return '' end -- a former try
local held = call('HMGET', P .. 'kept_bytes', 'of:' .. tenant, 'all')
if tonumber(held[1] or 0) + #record > tonumber(most_of_tenant) then return 'tenant' end
if tonumber(held[2] or 0) + #record > tonumber(most) then return 'total' end
charge_kept(tenant, #record)
call('HSET', name, 'tenant', tenant, 'sequences', sequences, 'seconds', seconds, 'linger', linger, 'bytes', #record,
  'record', record)
call('ZADD', P .. 'kept', server_time() + tonumber(linger), id)
return ''
