"""Images and labels: folders, readers, and the embedded digits."""
