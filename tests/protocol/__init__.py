"""The wire protocol, TLS, tokens, and peers that break the rules."""
