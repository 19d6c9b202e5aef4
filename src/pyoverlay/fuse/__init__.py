"""The kernel's side: requests in, answers out."""
