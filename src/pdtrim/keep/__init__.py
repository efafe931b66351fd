"""What is kept on disk: whole files, marked folders, locks, and work that resumes."""
