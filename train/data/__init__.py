"""Images in training order, multi-crop views, augmentation and masks."""
