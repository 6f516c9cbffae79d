"""The messages that cross a border between two parts, one module a border: `work` (gateway, queue and
replica), `queue` (what a submit asks and answers), `registry` (what hosts, replicas and gateways share)."""
