"""What people read: tables and pictures of plans."""
