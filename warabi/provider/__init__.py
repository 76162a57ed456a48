"""The server: connections, requests, transfers, and migration."""
