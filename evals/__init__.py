"""What is measured, one file per kind of task, and the report that is made of it."""
