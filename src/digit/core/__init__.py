"""What every other part uses: errors, configs, files, devices, images."""
