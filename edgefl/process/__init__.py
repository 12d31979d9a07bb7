"""What a process does about itself: its descriptors, its children, its home folder, its log."""
