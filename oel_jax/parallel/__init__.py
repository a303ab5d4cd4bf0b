"""Device mesh, sharding rules, multi-host helpers. Imports no game and no stage."""
