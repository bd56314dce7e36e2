"""What several test suites share: daemons as processes, images, registries, leak checks."""
