-- Kept calls go before their time. ARGV: why, result ttl, then ids
for i = 3, #ARGV do end_kept(ARGV[i], 'Cancelled', ARGV[1], tonumber(ARGV[2])) end
flush(server_time())
return 0
