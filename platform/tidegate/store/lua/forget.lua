-- Nobody reads these any more: what has ended goes, with its log. ARGV: ids
local gone = {}
for _, id in ipairs(ARGV) do
  local state = call('HGET', P .. 'req:' .. id, 'state')
  if state and state ~= 'waiting' and state ~= 'running' then
    gone[#gone + 1] = P .. 'req:' .. id
    gone[#gone + 1] = P .. 'log:' .. id
  end
end
for from = 1, #gone, CHUNK do call('UNLINK', unpack(gone, from, math.min(from + CHUNK - 1, #gone))) end
return #gone / 2
