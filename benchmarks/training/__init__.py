"""What trainings take, and what they survive."""
