"""What a site and the coordinator share."""
