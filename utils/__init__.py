"""What two scripts must do identically, one module per subject."""
