// VICUS_API marks what the shared library exports; everything else is hidden.
#ifndef VICUS_EXPORT_H_
#define VICUS_EXPORT_H_

#if defined(__GNUC__)
#define VICUS_API __attribute__((visibility("default")))
#else
#define VICUS_API
#endif

#endif  // VICUS_EXPORT_H_
