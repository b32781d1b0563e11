"""What several rooms need of features."""
