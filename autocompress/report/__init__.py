"""What people read of a study: CSV files, terminal tables and the report page."""
