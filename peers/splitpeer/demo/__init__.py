"""The main job on one machine: four hospitals and a coordinator, five processes, real TLS over real sockets."""
