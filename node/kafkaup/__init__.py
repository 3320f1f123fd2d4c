"""Real Kafka brokers on this machine, for trying Oncekeeper out on Kafka and for its tests. Not for production."""
