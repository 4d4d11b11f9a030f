/* The page is the same as that of the board's writer, which is a part of the package. */
#include "../../src/stillframe/board/guests/programs/writer/page.h"
