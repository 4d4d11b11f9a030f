"""What the tests share: probes of the host, guest fixtures, the rule about skipped tests."""
