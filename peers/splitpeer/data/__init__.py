"""A site's images and labels: found, pseudonymised, loaded, cut into windows. Knows nothing of sockets."""
