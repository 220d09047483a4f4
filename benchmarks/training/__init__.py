"""What trainings on ImageNet would take: arithmetic, not measurements."""
